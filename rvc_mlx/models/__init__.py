"""Networks, channels last, pure functions of arrays."""
