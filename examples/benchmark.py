"""Time a PILON model beside its dense form: python examples/benchmark.py PILON_FOLDER ROUNDS"""

import sys

import pilon_compress as pc

model, rounds = sys.argv[1:]
found = pc.benchmark(model, pc.BenchConfig(rounds=int(rounds), context=32, variants=["pilon_loaded", "pilon_fp32"]))
for name, timing in (found.prefill or {}).items():
    print(f"{name}: {timing.seconds * 1e3:.2f} ms for {found.context} tokens, {timing.speedup:.2f} times dense")
