"""Print what a conversion would replace, or has replaced: python examples/inspect_model.py MODEL"""

import sys

import pilon_compress as pc

found = pc.inspect(sys.argv[1])
print(f"{found.architecture}, {found.form}: {found.replaced / found.parameters:.0%} of {found.parameters:,} parameters")
for projection in found.projections[:6]:
    print(f"  {projection.name}  {projection.d_in} x {projection.d_out}  {projection.bank or 'dense'}")
