"""`python -m unidpo`."""

from unidpo.cli import main

if __name__ == "__main__":
    main()
