"""`python -m perce_lite` is the command `perce-lite`."""

from perce_lite.cli.app import main

if __name__ == "__main__":
    main()
