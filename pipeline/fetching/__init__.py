"""Where images and pretrained weights come from, and how they are prepared."""
