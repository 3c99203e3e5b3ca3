"""The run-time type checker that the tests install on every function of rankwise."""

from beartype import BeartypeConf, beartype

# As static checkers do, take an int where a float is asked for (PEP 484's numeric tower).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
