"""The judge: outcomes at the owner, paired comparison and the gate at the centre."""
