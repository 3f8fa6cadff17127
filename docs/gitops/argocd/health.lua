-- Health of an InferenceService for Argo CD: argocd-cm, key resource.customizations.health.mainsail.dev_InferenceService.
--
-- Healthy      it serves what the newest spec asks for
-- Progressing  a rollout is under way (also while the gate waits for requests)
-- Suspended    paused by an annotation
-- Degraded     it will not go on without a change: rolled back, cannot load, refused by the API server
local annotations = obj.metadata.annotations or {}
if annotations["mainsail.dev/paused"] == "true" then
  return {status = "Suspended", message = "The annotation mainsail.dev/paused stops all writes."}
end
if obj.status == nil or obj.status.conditions == nil or obj.status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "The operator has not looked at the newest spec yet."}
end
local conditions = {}
for _, condition in ipairs(obj.status.conditions) do
  conditions[condition.type] = condition
end
local stalled, reconciling, ready = conditions["Stalled"], conditions["Reconciling"], conditions["Ready"]
if reconciling ~= nil and reconciling.status == "True" then
  local paused = reconciling.reason == "Paused"
  return {status = paused and "Suspended" or "Progressing", message = reconciling.message}
end
if stalled ~= nil and stalled.status == "True" then
  return {status = "Degraded", message = stalled.message}
end
if ready ~= nil and ready.status == "True" then
  return {status = "Healthy", message = ready.message}
end
return {status = "Progressing", message = ready ~= nil and ready.message or "Waiting for the condition Ready."}
