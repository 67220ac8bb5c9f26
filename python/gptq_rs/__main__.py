"""`python -m gptq_rs` is the command `gptq`."""

from ._program import main

main()
