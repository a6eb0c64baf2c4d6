"""Entry point of `python -m msae_sweep`, the command that a Ray job runs."""

from msae_sweep.cli import main

if __name__ == "__main__":
    main()
