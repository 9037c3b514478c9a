"""What the bench does on a GPU only: facts of the card, engines that stay on it, and the rows of the table."""
