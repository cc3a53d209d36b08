"""Online pre-training (OPT): what its algorithms share. It knows no host."""
