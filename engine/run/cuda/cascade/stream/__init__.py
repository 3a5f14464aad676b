"""The chunk kernel for Hopper: ``kernel`` starts one producer (``produce``) and warpgroups (``consume``)."""
