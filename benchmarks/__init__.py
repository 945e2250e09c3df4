"""How fast Uni-DPO trains and what it holds in memory, beside other ways to train on the same pairs."""
