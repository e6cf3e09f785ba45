"""Networks with fused layers."""
