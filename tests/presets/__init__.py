"""Every preset and recipe of ModelOpt, exported or refused."""
