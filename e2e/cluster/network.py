"""The cluster's addresses. They exist only inside its network namespace, so they are the same in every checkout."""

NODE = "node1"
NODE_IP = "10.77.0.1"
NODE_PREFIX = 24
ROUTER_IP = "10.77.0.254"  # nobody: packets for anywhere else end there
SERVICE_RANGE = "10.96.0.0/16"
SERVICE_API_IP = "10.96.0.1"
POD_RANGE = "10.244.0.0/16"
API_PORT = 6443
API_URL = f"https://{NODE_IP}:{API_PORT}"
DNS_PORT = 53
