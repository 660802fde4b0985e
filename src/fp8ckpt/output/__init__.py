"""What will be on disk: layouts, plans, what a base demands, partial-then-publish, side files."""
