depth = 40
