"""How large an exponent fp32 sums stand without a maximum taken out. Without torch, for option files."""

LARGEST_EXPONENT = 40.0  # exp(+-40), and its sum over any batch or queue, are far inside fp32
