"""Name the kernel that each projection of a layout runs on, as `inspect` and `bench` show it."""

from collections import Counter

from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.layout import Layout


def kernel_names(layout: Layout, device: str) -> dict[str, str]:
    """Return the kernel of each projection on a device type, and the number of components where the kernel pads it."""
    found = dict[str, str]()
    for name, spec in layout.projections.items():
        bank = layout.banks[spec.bank]
        kind = FORMATS[bank.quantization]
        active = spec.top_k * bank.rank
        pads = "" if active == kind.computed(active) else f", k·r {active} computed as {kind.computed(active)}"
        found[name] = kind.kernel(device, bank.d_in, spec.group) + pads
    for name, matrix in layout.matrices.items():
        found[name] = FORMATS[matrix.quantization].kernel(device, matrix.d_in, matrix.group)
    for name, one in layout.neurons.items():
        store = layout.neuron_banks[one.bank]
        d_in, group = layout.shape(name)[0], store.group if one.role == "down" else 0
        found[name] = FORMATS[store.quantization].kernel(device, d_in, group)
    return found


def kernel_note(names: dict[str, str], device: str) -> str:
    """Return the sentence that counts projections by kernel."""
    counts = Counter(names.values())
    listed = "; ".join(f"{kernel} ({count} of {len(names)} projections)" for kernel, count in counts.most_common())
    return f"Kernels on {device}: {listed}."
