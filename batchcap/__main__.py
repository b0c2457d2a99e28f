"""`python -m batchcap`: the command line where no script is on the PATH."""

from batchcap.cli import main

if __name__ == "__main__":
    main()
