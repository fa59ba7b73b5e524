"""Scripts that use bnsurgery, and what they share: network, data, and what they ran on."""
