"""The built-in strategies: plugins like any third party's, which import `snac_core` and libraries, nothing else."""
