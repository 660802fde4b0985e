"""Tests inside host trainers. They run in an environment of their own: `make test-hosts`, constraints-hosts.txt."""
