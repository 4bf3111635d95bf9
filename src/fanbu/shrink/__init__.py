"""Ways down: one file a method, each with ``shrink(parent, domain, out, context, *, ...)``."""
