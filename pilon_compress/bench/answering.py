"""Answer requests, one JSON object a line, in a process that holds a model. Imports no torch."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pilon_compress.errors import BadInput


def serve(begin: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer every line of stdin by what `begin` returns, until stdin ends; what libraries print goes to stderr.

    A mistake of the user is answered with {"refused": message}; other errors end the process.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        answer = begin()
        for line in sys.stdin:
            request = json.loads(line)
            told = {"bytes": peak_bytes()} if request == {"peak": True} else answer(request)
            print(json.dumps(told), file=answers, flush=True)
    except BadInput as reason:
        print(json.dumps({"refused": str(reason)}), file=answers, flush=True)
    os._exit(0)  # destructors of a server would only take time


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far.

    Linux counts the memory of the parent at the fork in ru_maxrss, so /proc is asked there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
