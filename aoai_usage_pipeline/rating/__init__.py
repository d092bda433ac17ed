"""Usage times price: which row of the price book applies to what, and exact costs. `match.py` also finds deployments and owners."""
