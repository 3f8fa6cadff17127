{{- define "mainsail.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "mainsail.labels" -}}
app.kubernetes.io/name: mainsail
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- define "mainsail.selector" -}}
app.kubernetes.io/name: mainsail
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "mainsail.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65534
runAsGroup: 65534
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "mainsail.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "mainsail.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}

{{- /* Copies of one component on different nodes, where there are several. */}}
{{- define "mainsail.apart" -}}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "mainsail.selector" . | nindent 12 }}
{{- end }}

{{- define "mainsail.gatewayArgs" -}}
{{- $args := list "--auth" (lower .Values.gateway.auth.mode) "--workers" (toString .Values.gateway.workers) -}}
{{- if .Values.gateway.auth.namespace -}}
{{- $args = concat $args (list "--keys-namespace" .Values.gateway.auth.namespace) -}}
{{- end -}}
{{- if .Values.gateway.tls.secretName -}}
{{- $args = concat $args (list "--tls-cert" "/etc/mainsail/tls/tls.crt" "--tls-key" "/etc/mainsail/tls/tls.key") -}}
{{- end -}}
{{- if .Values.gateway.endpointPicker.enabled -}}
{{- $args = concat $args (list "--epp-port" (toString .Values.gateway.endpointPicker.port)) -}}
{{- end -}}
{{- if not .Values.gateway.kvEvents -}}
{{- $args = append $args "--no-kv-events" -}}
{{- end -}}
{{- range .Values.gateway.externalNamespaces -}}
{{- $args = concat $args (list "--external-namespace" .) -}}
{{- end -}}
{{- toJson $args -}}
{{- end }}
