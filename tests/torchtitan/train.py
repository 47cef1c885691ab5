"""`torchtitan.train` on CPU and gloo: `torchrun ... -m tests.torchtitan.train`, with the options of torchtitan."""

from tests.torchtitan import cpu

if __name__ == "__main__":
    cpu.install(quiet=False)
    from torchtitan.train import main

    main()
