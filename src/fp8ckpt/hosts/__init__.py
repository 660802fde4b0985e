"""One module per host trainer, for what that trainer alone needs. The core never imports them."""
