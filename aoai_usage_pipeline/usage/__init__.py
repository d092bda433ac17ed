"""Event contracts and the one usage record they all become: `contracts/` has one file per contract, `raw_events.py` reads capture files with them."""
