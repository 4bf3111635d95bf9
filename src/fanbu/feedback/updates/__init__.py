"""Ways back whose owners train on their own rows from what the centre sends out, inner round after inner round."""
