"""Command lines as they are found on hosts, an option on each line; a backslash goes on."""

PROXMOX = """
/usr/bin/kvm -id 100
-name vm,debug-threads=on
-no-shutdown
-chardev socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5
-mon chardev=qmp-event,mode=control
-pidfile /var/run/qemu-server/100.pid
-daemonize
-smbios type=1,uuid=4e9bb9a2-0000-4000-8000-000000000000
-smp 4,sockets=1,cores=4,maxcpus=4
-nodefaults
-boot menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/qemu-server/bootsplash.jpg
-vnc unix:/var/run/qemu-server/100.vnc,password=on
-cpu host,+kvm_pv_eoi,+kvm_pv_unhalt
-m 2048
-object iothread,id=iothread-virtio0
-device pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e
-device VGA,id=vga,bus=pci.0,addr=0x2
-chardev socket,path=/var/run/qemu-server/100.qga,server=on,wait=off,id=qga0
-drive if=none,id=drive-ide2,media=cdrom,aio=io_uring
-device ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2,bootindex=101
-drive file=/dev/pve/vm-100-disk-0,if=none,id=drive-virtio0,format=raw,cache=none,aio=io_uring
-device virtio-blk-pci,drive=drive-virtio0,id=virtio0,bus=pci.0,addr=0xa,iothread=iothread-virtio0
-netdev type=tap,id=net0,ifname=tap100i0,script=/var/lib/qemu-server/pve-bridge,vhost=on
-device virtio-net-pci,mac=DE:AD:BE:EF:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0,bootindex=102
-machine type=pc+pve0
"""

LIBVIRT = """
/usr/bin/qemu-system-x86_64
-name guest=vm,debug-threads=on
-S
-object '{"qom-type":"secret","id":"masterKey0","format":"raw",\
"file":"/var/lib/libvirt/qemu/domain-1-vm/master-key.aes"}'
-machine pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram
-accel tcg
-object '{"qom-type":"memory-backend-ram","id":"pc.ram","size":1073741824}'
-m 1024
-overcommit mem-lock=off
-no-user-config
-nodefaults
-chardev socket,id=charmonitor,fd=22,server=on,wait=off
-mon chardev=charmonitor,id=monitor,mode=control
-rtc base=utc
-no-shutdown
-boot strict=on
-device '{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x2"}'
-blockdev '{"driver":"file","filename":"/var/lib/libvirt/images/vm.raw","node-name":"libvirt-1-storage"}'
-blockdev '{"node-name":"libvirt-1-format","driver":"raw","file":"libvirt-1-storage"}'
-device '{"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format",\
"id":"virtio-disk0","bootindex":1}'
-sandbox on,obsolete=deny
-msg timestamp=on
"""

OLD_LIBVIRT = """
/usr/libexec/qemu-kvm
-name guest=old,debug-threads=on
-S
-object secret,id=masterKey0,format=raw,file=/var/lib/libvirt/qemu/domain-2-old/master-key.aes
-machine pc-i440fx-rhel7.6.0,accel=kvm,usb=off,dump-guest-core=off
-cpu Skylake-Client-IBRS
-m 4096
-realtime mlock=off
-smp 2,sockets=2,cores=1,threads=1
"""

BY_SCRIPT = """
qemu-system-x86_64
-enable-kvm -cpu host
-M q35,smm=on
-global driver=cfi.pflash01,property=secure,value=on
-drive if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd
-m 4G -smp 2
-drive file=/images/vm.raw,format=raw,if=virtio,cache=none,discard=unmap
-nic user,model=virtio-net-pci,hostfwd=tcp::2222-:22
-usb -device usb-tablet
-vga virtio
-display none
-monitor unix:/run/vm.hmp,server,nowait
-qmp unix:/run/vm.qmp,server,nowait
-daemonize -pidfile /run/vm.pid
"""
