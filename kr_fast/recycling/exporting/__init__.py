"""What leaves a finished run in forms that others open: the Student and the synthetic images, each with a card."""
