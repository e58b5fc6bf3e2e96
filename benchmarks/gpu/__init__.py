"""Everything that only a GPU can show, in one run of less than ten minutes on one card of 80 GiB or more.

    python -m benchmarks run gpu               # all of it
    python -m benchmarks run gpu.attend        # the checks and this
    python -m benchmarks run gpu --smoke       # tiny shapes on a CPU; measures nothing

The checks come first and always run. A check that does not pass takes the numbers of its op away, and the exit code
is 1. Needs torch, triton, transformers, accelerate and peft, and what this package depends on.
"""
