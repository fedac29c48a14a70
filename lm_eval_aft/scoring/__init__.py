"""Log-likelihoods and generation that give stock `hf` answers while reading every context once."""
