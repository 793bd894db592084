{{- define "csi-vduse.driver" -}}csi.vduse.dev{{- end }}

{{- define "csi-vduse.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else }}{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}{{- end }}{{- end }}
{{- end }}

{{/* Labels that never change over a release's life: what selectors use. Call with (list $ "component"). */}}
{{- define "csi-vduse.selector" -}}
app.kubernetes.io/name: {{ default (index . 0).Chart.Name (index . 0).Values.nameOverride }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "csi-vduse.labels" -}}
{{ include "csi-vduse.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/part-of: csi-vduse
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{/* Labels of a pod: the selector's, the version, and what the user adds. Call with (list $ "component" podLabels). */}}
{{- define "csi-vduse.podLabels" -}}
{{ include "csi-vduse.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/part-of: csi-vduse
{{- with index . 2 }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "csi-vduse.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}{{ end }}
{{- end }}

{{/* An image given as {repository, tag, digest}. */}}
{{- define "csi-vduse.otherImage" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end }}

{{- define "csi-vduse.logging" -}}
- --log-format={{ .Values.logging.format }}
- --log-level={{ .Values.logging.level }}
{{- end }}

{{/* What a container that needs no right at all runs with. */}}
{{- define "csi-vduse.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "csi-vduse.poolLocation" -}}
{{- if eq .kind "qsd" -}}
unix:{{ .path }}/control.sock
{{- else -}}
{{ .path }}{{ with .maxHoldSeconds }}?max-hold-seconds={{ . }}{{ end }}
{{- end -}}
{{- end }}

{{- define "csi-vduse.poolMounts" -}}
{{- range .Values.pools }}
- name: pool-{{ .name | replace "." "-" }}
  mountPath: {{ .path }}
  # A file system that the host mounts there later is seen.
  mountPropagation: HostToContainer
{{- end }}
{{- end }}

{{/* Where a shared pool's certificates are, in the controller and on nodes. */}}
{{- define "csi-vduse.certificates" -}}/etc/csi-vduse/pools/{{ .name }}{{- end }}

{{- define "csi-vduse.certificateMounts" -}}
{{- range .Values.sharedPools }}
- {name: shared-{{ .name | replace "." "-" }}, mountPath: {{ include "csi-vduse.certificates" . }}, readOnly: true}
{{- end }}
{{- end }}

{{/* Call with (list $ "nodeSecret"). */}}
{{- define "csi-vduse.certificateVolumes" -}}
{{- $secret := index . 1 }}
{{- range (index . 0).Values.sharedPools }}
- name: shared-{{ .name | replace "." "-" }}
  secret: {secretName: {{ index . $secret }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "csi-vduse.poolVolumes" -}}
{{- range .Values.pools }}
- name: pool-{{ .name | replace "." "-" }}
  hostPath: {path: {{ .path }}, type: {{ if .create }}DirectoryOrCreate{{ else }}Directory{{ end }}}
{{- end }}
{{- end }}
