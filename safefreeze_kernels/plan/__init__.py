"""What is frozen: masks, plans and their files. Knows no model."""
