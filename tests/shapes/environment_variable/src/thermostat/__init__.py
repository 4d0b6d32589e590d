import os

limit = int(os.environ["THERMOSTAT_LIMIT"])
