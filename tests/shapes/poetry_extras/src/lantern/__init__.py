light = "on"
