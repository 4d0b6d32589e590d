rows = 4
