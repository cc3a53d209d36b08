"""The old name of `python -m corl.shim`, which this runs; it will go with the next version."""

from corl.shim.__main__ import main

if __name__ == "__main__":
    main()
