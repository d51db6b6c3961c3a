"""`python -m fastsae`, and `torchrun -m fastsae` for several processes."""

from fastsae.cli import main

main()
