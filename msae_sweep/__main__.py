"""`python -m msae_sweep`: what a Ray job runs."""

from msae_sweep.cli import main

if __name__ == "__main__":
    main()
