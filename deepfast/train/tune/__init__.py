"""``python -m deepfast tune``: trials of one configuration after the other, in processes of their own."""
