pages = 16
