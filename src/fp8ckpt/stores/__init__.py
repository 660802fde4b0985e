"""Where checkpoints are read from, and sent to: local directories, memory, remote stores."""
