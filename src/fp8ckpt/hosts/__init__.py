"""Leaf modules, one a host trainer: what is special to it. The core never imports them."""
