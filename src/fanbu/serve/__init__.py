"""Small local pages over what the ledger wrote."""
