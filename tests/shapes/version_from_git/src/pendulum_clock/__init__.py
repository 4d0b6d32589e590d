from pendulum_clock._version import version as version
