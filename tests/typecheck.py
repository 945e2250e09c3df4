"""The checker that holds the package to its type hints while the tests run; see `addopts` in pyproject.toml."""

from beartype import BeartypeConf, beartype

# PEP 484: where a float is asked for, an int will do.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
