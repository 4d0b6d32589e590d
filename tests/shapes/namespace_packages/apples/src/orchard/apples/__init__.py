from orchard.core import rows

count = rows * 10
