"""Every preset of ModelOpt, exported or refused."""
