"""Scripts beside the main ones. Run them from the top folder: python -m tools.NAME"""
